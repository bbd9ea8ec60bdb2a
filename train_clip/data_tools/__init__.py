"""Extension: check pairs before training (`data check`, `show`), divide them (`split`), cache pixels (`npz`)."""
