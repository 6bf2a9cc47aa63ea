"""What a teacher makes of the images of a student's run, written once."""
