// What a CUDA kernel can find wrong in values that only the device has seen. The kernel skips them and raises a flag,
// one int32 a fault on the device; Python reads the flags where it waits for the device anyway (pyrlhf/ops/_core.py:
// FAULTS, in the same order).
#pragma once

namespace pyrlhf {

enum class Fault : int {
    gae_cu_seqlens,
    ranking_loss_cu_groups,
    write_kv_slots,
    decode_attention_seq_lens,
    decode_attention_page_table,
    sample_logits,
    linear_logprob_targets,
    sampled_logprob_tokens,
    attention_cu_seqlens,
    attention_prefix,
};

}  // namespace pyrlhf
