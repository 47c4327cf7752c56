"""What `kvbm doctor` looks at. Checks take the file system's root, or the values that they judge."""
