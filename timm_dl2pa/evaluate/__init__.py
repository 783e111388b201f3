"""The command `timm-dl2pa evaluate`: what a model makes of a data set, as numbers and as a report."""
