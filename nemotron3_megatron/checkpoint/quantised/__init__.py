"""A trained model's weights as the codes and scales that its own forward pass read."""
