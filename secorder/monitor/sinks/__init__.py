"""Where numbers go while a model trains: one small file each, all of one shape (:class:`~.sink.Sink`)."""
