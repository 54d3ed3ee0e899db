"""What a model is trained for and judged by: scores of the text it generates."""
