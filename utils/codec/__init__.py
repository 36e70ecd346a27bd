"""From a picture to a file and back: `encode.encode(model, image, request)` and `decode.decode(model, data)`."""
