"""Print the table of all settings for docs/configuration.md."""

from kvbm.config import iter_settings


def main() -> None:
    print("| Key | Allowed | Default | Environment variable | Meaning |")
    print("|---|---|---|---|---|")
    for row in iter_settings():
        print(f"| `{row.key}` | {row.type} | {row.default} | `{row.env}` | {row.doc} |")


if __name__ == "__main__":
    main()
