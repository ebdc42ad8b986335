"""Training on DeepSpeed (`zero`), training and generating with one set of weights (`hybrid`), saving both (`checkpoint`)."""
