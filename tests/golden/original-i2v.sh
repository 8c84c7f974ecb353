env -u PYTHONHOME -u PYTHONPATH CUDA_DEVICE_ORDER=PCI_BUS_ID HF_HUB_OFFLINE=1 /engine/bin/python corrected.py -m musubi_tuner.hv_1_5_cache_latents \
    --dataset_config staging/latents.toml \
    --vae /weights/vae \
    --vae_sample_size 128 \
    --i2v \
    --image_encoder /weights/image_encoder

env -u PYTHONHOME -u PYTHONPATH CUDA_DEVICE_ORDER=PCI_BUS_ID HF_HUB_OFFLINE=1 /engine/bin/python corrected.py -m musubi_tuner.hv_1_5_cache_text_encoder_outputs \
    --dataset_config staging/text.toml \
    --text_encoder /weights/text_encoder \
    --byt5 /weights/byt5 \
    --batch_size 4 \
    --fp8_vl

env -u PYTHONHOME -u PYTHONPATH CUDA_DEVICE_ORDER=PCI_BUS_ID HF_HUB_OFFLINE=1 /engine/bin/python corrected.py -m accelerate.commands.launch \
    --config_file accelerate.yaml \
    --num_processes 1 \
    --num_machines 1 \
    --num_cpu_threads_per_process 1 \
    --dynamo_backend no \
    --mixed_precision bf16 corrected.py \
    -m musubi_tuner.hv_1_5_train_network \
    --dit /weights/transformer \
    --vae /weights/vae \
    --text_encoder /weights/text_encoder \
    --byt5 /weights/byt5 \
    --image_encoder /weights/image_encoder \
    --dataset_config dataset.toml \
    --task i2v \
    --sdpa \
    --mixed_precision bf16 \
    --timestep_sampling shift \
    --weighting_scheme none \
    --discrete_flow_shift 2.0 \
    --optimizer_type adamw8bit \
    --learning_rate 0.0001 \
    --gradient_checkpointing \
    --max_data_loader_n_workers 2 \
    --persistent_data_loader_workers \
    --network_module networks.lora_hv_1_5 \
    --network_dim 32 \
    --max_train_epochs 10 \
    --save_every_n_epochs 1 \
    --seed 42 \
    --output_dir checkpoints \
    --output_name lora \
    --fp8_base \
    --fp8_scaled \
    --fp8_vl \
    --logging_dir tensorboard
