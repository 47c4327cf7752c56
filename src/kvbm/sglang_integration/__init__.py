"""KVBM in SGLang: a HiCache storage backend (`hicache`), or a linker that moves device pages (`linker`)."""
