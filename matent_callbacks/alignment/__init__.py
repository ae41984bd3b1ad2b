"""Image-text alignment: a probe of pairs in, named numbers out."""
