"""What a version of a network costs and how well it answers, measured on what would be deployed."""
