"""What `dpo X` does, a file a command."""
