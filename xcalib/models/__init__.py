"""What xcalib knows about transformers models: loading, structure, the attention switch and the logit head."""
