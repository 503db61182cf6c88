"""What all commands share: parsing, help, console, run directories, loading and saving."""
