"""`llambo doctor`"""
