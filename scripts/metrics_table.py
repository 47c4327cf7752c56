"""Print the table of all metrics for docs/observe.md."""

from kvbm.observe.metrics import table

if __name__ == "__main__":
    print(table())
