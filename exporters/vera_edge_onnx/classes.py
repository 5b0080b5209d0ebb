"""What transformers calls the model classes that aren't exported whole as encoders."""

from __future__ import annotations

# Encoder and decoder in one, whose encoder is exported: the class that loads the whole.
ENCODER_OF = {"WhisperModel": "AutoModel", "WhisperForConditionalGeneration": "AutoModelForSpeechSeq2Seq"}
