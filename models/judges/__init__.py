"""What measures generated images: networks trained on the data set, published ones, and the metrics."""
