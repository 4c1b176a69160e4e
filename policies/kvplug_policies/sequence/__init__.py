"""What a running request keeps."""
