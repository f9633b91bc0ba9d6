"""What a trained model withstands."""
