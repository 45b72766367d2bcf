"""The life of a request: admission, refusals, dispatch, delivery, end, who follows or cancels it, a lost broker."""
