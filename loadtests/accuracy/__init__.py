"""What precisions and policies cost in accuracy."""
