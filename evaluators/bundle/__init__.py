"""What a deployed folder holds, and the program that runs it."""
