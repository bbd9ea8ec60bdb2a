"""Extension: any image encoder joined with any text encoder, of this package or of other libraries; `finetune`."""
