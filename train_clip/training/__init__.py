"""Everything that uses Lightning: the module, the data module, minibatches, optimizers, callbacks."""
