"""Networks: encoders, the heads on them, and where pretrained weights come from."""
