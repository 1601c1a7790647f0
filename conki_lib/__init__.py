"""ConKI, contrastive knowledge injection for multimodal sentiment analysis."""

__version__ = "0.1.0"
