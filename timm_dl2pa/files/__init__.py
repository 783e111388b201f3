"""Folders and Hub repositories: config and weights are found, checked, read and replaced; model cards; uploads."""
