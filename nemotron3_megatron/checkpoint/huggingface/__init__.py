"""Models to and from Hugging Face's ``nemotron_h``, with memory for a few tensors."""

from nemotron3_megatron.checkpoint.huggingface.export import export_model
from nemotron3_megatron.checkpoint.huggingface.load import import_model

__all__ = ["export_model", "import_model"]
