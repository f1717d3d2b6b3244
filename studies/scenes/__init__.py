"""The default study: handwritten digits in scenes, some easy to read and some hard, made from scikit-learn's digits."""
