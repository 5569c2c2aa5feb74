"""TensorFlow's wrapper: its arguments, state filters and configs."""
