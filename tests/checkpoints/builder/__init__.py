"""The parts of `build_tiny_idefics3.py`: scenes, language, tokenizer, model, training, figures."""
