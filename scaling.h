// What a training step costs on many GPUs, from figures that anyone can look up: operations over
// the rate of a card, bytes over the bandwidth of its memory, gradients over the links within and
// between machines. Nothing here runs or measures anything, and nothing needs a GPU.
//
// The step is that of train_gpt2.cu: passes over micro-batches, gradients summed over ranks, a
// bucket for each block behind the backward pass of the last micro-batch and one for what exists
// once (the embeddings, the last layer norm) after it, then AdamW on every rank; or, with sharded
// states, of each rank's part, which goes to all before the next forward pass needs it. How far the
// model is off where others have measured stands in dev/bench/README.md.
#pragma once

#include "gpt2.h"

// ==== cards ======================================================================================

// Dense bf16 operations/s with float32 sums, memory, and what a card sends to its neighbours of the
// same machine in one direction, as NVIDIA's data sheets give them: NVLink where the data sheet's
// system has a switch for it, else the card's PCI Express. `share` is the part of `tflops` that
// passes of GPT-2 were published to reach (llm.c on 8 of them: 774M on A100, github.com/karpathy/
// llm.c scripts/run_gpt2_774M.sh; 1558M on H100, discussion 677; taken over for other cards of the
// same chip); 0: none was found.
struct Card {
    const char* name;
    double tflops, memory_gb_s, memory_gb, node_link_gb_s, share;
};

// The first name that is part of a card's own stands for it.
constexpr Card kCards[] = {
    {"H100 PCIe", 756, 2000, 80, 64, 0.48},
    {"H100 NVL", 835, 3900, 94, 64, 0.48},
    {"H100", 989, 3350, 80, 450, 0.48},
    {"GH200", 989, 4000, 96, 450, 0.48},
    {"H200", 989, 4800, 141, 450, 0.48},
    {"B200", 2250, 8000, 180, 900, 0},
    {"A100-SXM4-40GB", 312, 1555, 40, 300, 0.6},
    {"A100-PCIE-40GB", 312, 1555, 40, 32, 0.6},
    {"A100 80GB PCIe", 312, 1935, 80, 32, 0.6},
    {"A100", 312, 2039, 80, 300, 0.6},
    {"A30", 165, 933, 24, 32, 0},
    {"A40", 149.7, 696, 48, 32, 0},
    {"RTX A6000", 154.8, 768, 48, 32, 0},
    {"A10G", 70, 600, 24, 32, 0},
    {"A10", 125, 600, 24, 32, 0},
    {"L40S", 362, 864, 48, 32, 0},
    {"L4", 121, 300, 24, 32, 0},
    {"RTX 3090", 71, 936, 24, 32, 0},
    {"RTX 4090", 165.2, 1008, 24, 32, 0},
    {"RTX 5090", 209.5, 1792, 32, 64, 0},
};

// The card of that name, or null.
inline const Card* find_card(const std::string& name) {
    for (const Card& card : kCards)
        if (name.find(card.name) != std::string::npos) return &card;
    return nullptr;
}

// ==== the cluster ================================================================================

// Shares of a published rate that a step is taken to reach.
//   links   NCCL's sums reach 370 of NVLink's 450 GB/s on H100 (NVIDIA/nccl-tests issue 212, by its
//           maintainer), 233 of 300 on A100, and 86 of the network's 100 GB/s between two machines
//           of A100 (issue 175): 0.82, 0.78, 0.86
//   memory  of an update, which streams: assumed
constexpr double kLinkShare = 0.8, kMemoryShare = 0.9;

// Bytes of memory that an update moves for each parameter, as in dev/bench/roofline.py: AdamW reads
// parameter, gradient and both moments and writes all but the gradient in float32, and a copy in
// bf16; the norm reads the gradients, and they are zeroed.
constexpr double kUpdateBytes = 7 * 4 + 2 + 4 + 4;

// Machines of equal cards. Rates are those of data sheets, in operations or bytes a second. The
// latencies are NCCL's own for rings (tuning.cc, protocol Simple): of a call, of a hop within a
// machine, and of one between machines.
struct Cluster {
    int gpus = 1, nodes = 1;  // GPUs of a node
    double flops = 0, share = 0, memory = 0, node_link = 0, link = 0;
    double call_s = 8.4e-6, node_hop_s = 3.4e-6, hop_s = 14e-6;

    double world() const { return double(gpus) * nodes; }
};

// Seconds to sum `bytes` over all GPUs so that each has the sum: reduce-scatter within a machine,
// all-reduce between GPUs of the same place in their machines, each with a part of 1 / gpus and an
// adapter of its own, all-gather within the machine. The three are pipelined in chunks, so that the
// slower kind of link decides. A ring of n moves 2 (n-1) / n of the bytes over each link
// [Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms"]; between machines a tree of
// depth log2(nodes) answers sooner, and NCCL has both.
inline double all_reduce_s(const Cluster& c, double bytes) {
    if (c.world() <= 1) return 0;
    double within = 2.0 * (c.gpus - 1) / c.gpus * bytes / (kLinkShare * c.node_link);
    double between = 2.0 * (c.nodes - 1) / c.nodes * bytes / c.gpus / (kLinkShare * c.link);
    double hops_s = 2 * (c.gpus - 1) * c.node_hop_s + 2 * std::ceil(std::log2(c.nodes)) * c.hop_s;
    return c.call_s + std::max(within, between) + hops_s;
}

// Whether the links between machines are those that a sum waits for.
inline bool waits_between_nodes(const Cluster& c) {
    double within = c.gpus > 1 ? 2.0 * (c.gpus - 1) / c.gpus / c.node_link : 0;
    return c.nodes > 1 && 2.0 * (c.nodes - 1) / c.nodes / c.gpus / c.link >= within;
}

// ==== a step =====================================================================================

struct StepCost {
    double passes_s = 0;         // forward and backward, of all micro-batches
    double update_s = 0;         // AdamW
    double communication_s = 0;  // all sums over ranks
    double exposed_s = 0;        // what of them is left when the backward pass has ended
    double tokens = 0;           // of the step, over all ranks
    double alone_s = 0;          // what one GPU takes for a step of as many tokens

    double step_s() const { return passes_s + update_s + exposed_s; }
    double tokens_per_s() const { return tokens / step_s(); }
};

// Numbers of the gradients of a block, or of what exists once: a bucket.
inline size_t bucket_numbers(const GPT2Config& config, bool block) {
    size_t numbers = 0;
    for (const ParameterRow& row : parameter_table(config))
        if (row.per_layer() == block) numbers += row.size();
    return numbers;
}

// What is left of sums that begin as the blocks' backward passes end, one after the other, when the
// last of these has ended; behind them follows the sum of what exists once.
inline double exposed_sums_s(int blocks, double backward_s, double block_sum_s, double last_sum_s) {
    double sent_s = 0;
    for (int l = 1; l <= blocks; l++) sent_s = std::max(sent_s, l * backward_s) + block_sum_s;
    return std::max(sent_s - blocks * backward_s, 0.0) + last_sum_s;
}

// How long a forward pass waits, all in all, for parameters that come in its own order.
inline double exposed_gathers_s(int blocks, double forward_s, double block_s, double first_s) {
    double come_s = first_s, done_s = first_s;
    for (int l = 1; l <= blocks; l++) {
        come_s += block_s;
        done_s = std::max(done_s, come_s) + forward_s;
    }
    return std::max(done_s - blocks * forward_s, 0.0);
}

// What a step of `micro_batches` of shape.B sequences of shape.T tokens on each rank costs.
// Backward takes twice as long as forward; with shape.recompute 3 it computes the block's forward
// pass again. Buckets leave in the order in which backward finishes them, one at a time; a
// reduce-scatter or all-gather is half of an all-reduce. With sharded gradients those of blocks
// leave in every pass. That products run slower beside them, and that ranks wait for the slowest,
// is left out.
inline StepCost step_cost(const GPT2Config& config, const GPT2Shape& shape, int micro_batches,
                          const Cluster& c) {
    GPT2Config head = config;  // what is left of a model without blocks: the classifier
    head.layers = 0;
    double batch = double(shape.B) * shape.T, rate = c.share * c.flops, L = config.layers;
    double head_s = batch * operations_per_token(head, shape.T) / rate;
    double block_s = batch * operations_per_token(config, shape.T) / rate / L - head_s / L;
    double again_s = shape.recompute >= 3 ? block_s / 3 : 0;
    double pass_s = head_s + L * (block_s + again_s), backward_s = block_s * 2 / 3 + again_s;
    double block = double(bucket_numbers(config, true)),
           once = double(bucket_numbers(config, false));
    bool sharded = shape.zero > 0;
    StepCost cost;
    cost.tokens = batch * micro_batches * c.world();
    cost.passes_s = micro_batches * pass_s;
    double whole_update_s =
        kUpdateBytes * double(allocated_parameters(config)) / (kMemoryShare * c.memory);
    cost.update_s = sharded ? whole_update_s / c.world() : whole_update_s;
    cost.alone_s = c.world() * cost.passes_s + whole_update_s;
    double sum = shape.reduce == Dtype::bf16 ? 2 : 4;
    if (shape.sums_exactly && !sharded) sum = 3;  // pieces of 2 bytes come, sums of 4 go
    if (sharded) sum /= 2;
    double block_sum_s = all_reduce_s(c, sum * block), last_sum_s = all_reduce_s(c, sum * once);
    cost.communication_s = L * block_sum_s + last_sum_s;
    cost.exposed_s = exposed_sums_s(config.layers, backward_s, block_sum_s, last_sum_s);
    if (shape.zero == 2) {
        int before = micro_batches - 1;
        cost.communication_s += before * L * block_sum_s;
        cost.exposed_s += before * exposed_sums_s(config.layers, backward_s, block_sum_s, 0);
    }
    if (sharded) {
        double block_gather_s = all_reduce_s(c, block), once_gather_s = all_reduce_s(c, once);
        cost.communication_s += L * block_gather_s + once_gather_s;
        cost.exposed_s +=
            exposed_gathers_s(config.layers, block_s / 3, block_gather_s, once_gather_s);
    }
    return cost;
}

// Tokens/s of the cluster over those of as many GPUs that each do such steps alone: at most 1.
inline double efficiency(const StepCost& cost, const Cluster& c) {
    return cost.alone_s / (c.world() * cost.step_s());
}

// What takes the largest part of a step.
inline const char* bound_by(const StepCost& cost, const Cluster& c) {
    if (cost.passes_s >= std::max(cost.update_s, cost.exposed_s)) return "operations";
    if (cost.update_s >= cost.exposed_s) return "memory, in the update";
    return waits_between_nodes(c) ? "links between nodes" : "links within a node";
}
