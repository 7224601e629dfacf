"""The formats of a merged model besides 16-bit safetensors: NF4, GGUF, a Modelfile for Ollama."""
