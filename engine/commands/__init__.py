"""What `dpo X` does, a file a command, each with a `main(run)`."""
