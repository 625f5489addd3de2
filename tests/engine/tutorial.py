"""The run file of the tutorial, to the letter."""

# As in the tutorial of the trainer whose run files this program takes over.
TUTORIAL = """\
config:
  model:
    name_or_path: meta-llama/Llama-3.1-8B-Instruct
  reference_model:
    name_or_path: meta-llama/Llama-3.1-8B-Instruct
  mixture:
    informs:
      - type: hf
        data_files: trl-lib/ultrafeedback_binarized
        split: "train[:90%]"
  trainer:
    trainer_type: dpo
    beta: 0.08
    loss_type: sigmoid
    max_length: 2048
    max_prompt_length: 1024
    total_batch_size: 16
    learning_rate: 1e-6
    num_train_epochs: 3
actions:
  - train
"""
