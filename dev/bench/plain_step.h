// The yardstick of `make bench`: one training step of the same GPT-2, written as plain loop nests.
#pragma once

#include <memory>

#include "../../gpt2.h"

class PlainModel {
  public:
    PlainModel(const GPT2Config& config, int B, int T);
    ~PlainModel();

    // Takes over the parameters of a model of the program's own, of the same config.
    void copy_parameters(const GPT2* model);

    // Forward, backward, global norm, clipping and AdamW on one batch, inputs and targets (B,T);
    // returns the mean loss before the update.
    double step(const int* inputs, const int* targets, const AdamW& adamw);

  private:
    struct State;
    std::unique_ptr<State> state_;
};
