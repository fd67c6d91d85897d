"""What happens in which order: command line, specs, campaigns, tracking."""
