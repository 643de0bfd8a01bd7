class MaskGIT:
    def __init__(self, config, tokenizer, transformer):
        self.config=config; self.tokenizer=tokenizer; self.transformer=transformer
