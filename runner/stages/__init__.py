"""What ``commands.sh`` calls beside the engines' executables."""
