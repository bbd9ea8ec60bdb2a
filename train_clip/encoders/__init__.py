"""Extension: join any image encoder and any text encoder, of this package or other libraries; `finetune`."""
