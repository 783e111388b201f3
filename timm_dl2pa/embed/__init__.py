"""The command `timm-dl2pa embed`: the embeddings of a folder of images, in one file."""
from .table import Embeddings, read_embeddings

__all__ = ['Embeddings', 'read_embeddings']
