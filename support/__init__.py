"""What the commands share: one level, in reading order. No module here imports a command.

Model

    cpu_attention      causal attention, with a faster path for bfloat16 on some CPUs
    fused_loss         head and cross-entropy in chunks; the model as the training step calls it
    generation         KV cache, sampling from logits, texts from a model
    quantize           a model with its matrices in 8 bits, for sampling and scoring
    model_function     whether the model's code computes GPT-2 or another function
    model_files        the directory of a model, here or on the Hub, and the tensors in it
    huggingface        a GPT to and from a Hugging Face directory or a model of the Hub
    muon               the optimizer Muon, and several optimizers used as one
    hellaswag_eval     the HellaSwag score, in training and by itself

Data

    text_encoding      the rule by which all text is read
    tokenizer          GPT-2's byte-pair encoding, from the ranks in gpt2.tiktoken
    shards             reading token shards: stream, manifest, order of an epoch
    shard_writer       writing token shards, safe against a kill at any instant
    text_files         text files as pieces that one process can tokenize
    hub                the files of a dataset on the Hugging Face Hub

Run

    validate_settings  ranges and combinations of the trainer's settings
    autotune           the micro-batch that fits, and whether the model compiles
    checkpoint         checkpoint directories that are either complete or not there
    after_checkpoint   the user's shell command after each checkpoint
    run_lock           one run at a time in a log directory
    run_output         all that a run shows and records, in one place
    step_log           console lines of training steps
    device_clock       the end of a step on a device, and its results on the host
    run_log            the files of a log directory, and whether its run may be continued
    trackers           TensorBoard and Weights & Biases
    stop_signals       all ranks stop at the same step on SIGTERM, SIGINT and SIGUSR1

Base

    distributed        rank, world size, device and dtype; the process group; lost processes
    devices            which device and dtype to use, and how fast the device could be
    launch             the launcher's variables, and printing on one or on every rank
    cli                a command line made from a dataclass of settings
    files              files that are either complete or not there
    errors             errors that the user can correct, each in one line
"""
