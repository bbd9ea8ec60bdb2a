"""Extension: pairs looked at before training (`data check`, `show`), divided (`split`), their pixels cached (`npz`)."""
