"""``python tests/servers/llama_cpp.py GGUF``: llama.cpp's server from the package xllamacpp, until it is ended.

llama.cpp's own ``llama-server`` does the same.
"""

import argparse
import threading

import xllamacpp


def main():
    """Serve one file by a name, with a LoRA adapter if one is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--alias", required=True, help="what requests call the weights")
    parser.add_argument("--lora", help="an adapter's GGUF")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a chat at most")
    parser.add_argument("--parallel", type=int, default=4, help="requests at a time")
    parser.add_argument("--threads", type=int, default=-1)
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = options.gguf
    params.model_alias = {options.alias}
    params.hostnames, params.port = ["127.0.0.1"], options.port
    params.n_parallel, params.n_ctx = options.parallel, options.context * options.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    if options.lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(options.lora, 1.0)]
    server = xllamacpp.Server(params)
    print(f"serving {options.alias} at {server.listening_address}/v1", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
