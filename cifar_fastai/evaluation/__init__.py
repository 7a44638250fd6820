"""What a trained network says: predictions and heatmaps."""
