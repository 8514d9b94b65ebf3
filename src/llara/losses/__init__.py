"""The objectives of both training stages."""
