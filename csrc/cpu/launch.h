// The CPU side of each op: picks the instruction set and spreads tokens or rows over threads.
#pragma once

#include "core/arguments.h"

namespace alum::cpu {

void noise_init(const NoiseArguments& args);
void projected_ascent(const AscentArguments& args);
void divergence_loss(const DivergenceArguments& args);
void divergence_gradient(const DivergenceArguments& args);
void divergence_loss_and_gradient(const DivergenceArguments& args);
void linear_divergence(const DivergenceArguments& args);

// Name of the instruction set in use.
const char* capability();

}  // namespace alum::cpu
