"""The life of a request: admission, dispatch, delivery, end, and how it survives a broker that is restarted."""
