# Builds, runs and tests train_gpt2; `make help` lists what it can do.
#
# What is made lies under build/, in a folder for each compiler and variant (build/g++,
# build/clang++-double, ...), so that switching between them mixes nothing. ./train_gpt2 is a link
# to the program that was built last, and so are ./train_gpt2cu (for a GPU) and ./train_gpt2cu_emu
# (the same on the emulator). Variables that a user may set: CXX, CXXFLAGS, CPPFLAGS, LDFLAGS, OPT,
# ARCH, ONEDNN=no; CUDA_HOME, CUDA_ARCH, NCCL=no for `make cuda`, CUDNN=no for its benchmarks; DATA, OUT,
# TIME, PROMPT for `make train`; BENCH for `make bench`.

VARIANT ?=
ARCH ?= -march=native
OPT ?= -O3
FOLDER := build/$(notdir $(firstword $(CXX)))$(if $(VARIANT),-$(VARIANT))

.DEFAULT_GOAL := train_gpt2
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# ==== what this machine has ======================================================================

# Homebrew keeps its headers and libraries where no compiler looks for them.
ifeq ($(shell uname),Darwin)
    BREW := $(shell brew --prefix 2>/dev/null)
    CPPFLAGS += $(if $(BREW),-isystem $(BREW)/include)
    LDFLAGS += $(if $(BREW),-L$(BREW)/lib)
endif
export CXX CPPFLAGS

# OpenMP's threads wait for each other by spinning, for milliseconds unless told otherwise. On a
# machine that does other work too they then burn the time that the thread they wait for needs: on
# two busy cores a training step took seven times as long. 3,000 turns cost nothing where the cores
# are free; clang++'s library counts in milliseconds.
export GOMP_SPINCOUNT ?= 3000
export KMP_BLOCKTIME ?= 1

# Words such as run:utf8proc.h, for the headers that the compiler does not find.
MISSING := $(shell scripts/install_deps.sh missing)
MISSING_HERE := $(filter run:%,$(MISSING))

# NVIDIA's headers and nvcc: under CUDA_HOME, else beside the nvcc that is in the path, else where
# its installer puts them.
NVCC_PATH := $(shell command -v nvcc 2>/dev/null)
CUDA_HOME ?= $(firstword $(if $(NVCC_PATH),$(patsubst %/bin/nvcc,%,$(shell readlink -f $(NVCC_PATH)))) \
    $(wildcard /usr/local/cuda))
CUDA_HEADERS := $(and $(CUDA_HOME),$(wildcard $(CUDA_HOME)/include/cublasLt.h))
# cuDNN, which attention's benchmark puts beside ours; it is opened when the benchmark runs.
CUDNN ?= $(if $(wildcard $(addsuffix /cudnn.h,$(CUDA_HOME)/include /usr/include /usr/local/include \
    /usr/include/*-linux-gnu)),yes,no)
# NCCL, through which several GPUs train one model.
NCCL ?= $(if $(wildcard $(addsuffix /nccl.h,$(CUDA_HOME)/include /usr/include /usr/local/include)),yes,no)
NVCC := $(and $(CUDA_HOME),$(wildcard $(CUDA_HOME)/bin/nvcc))

# ==== flags ======================================================================================

# No -ffast-math: it would let the compiler assume that no number is NaN, and remove the checks.
# -fno-math-errno: nobody reads errno after sqrt, and clang++ vectorises no loop that must set it.
FLAGS := -std=c++20 $(OPT) $(ARCH) -fno-math-errno -fopenmp -pthread -Wall -Wextra -Werror
# What packs text is used where it is there; the program says so when it meets a file without.
PACKING := $(if $(filter wish:zlib.h,$(MISSING)),,-DGPT2_ZLIB) \
    $(if $(filter wish:zstd.h,$(MISSING)),,-DGPT2_ZSTD)
FLAGS += $(PACKING)
TEXT_LIBRARIES := -lutf8proc -lxxhash $(if $(findstring ZLIB,$(PACKING)),-lz) \
    $(if $(findstring ZSTD,$(PACKING)),-lzstd)
LIBRARIES := $(TEXT_LIBRARIES)

# The variants that the tests build beside the program itself. Central differences need double;
# oneDNN has no double product, and the thread sanitizer cannot see into a library that it did not
# compile, so both use the plain one. (-Wno-pass-failed: clang++ vectorises little at -O1, and
# says so.)
ifeq ($(VARIANT),double)
    FLAGS += -DGPT2_REAL=double
    override ONEDNN := no
else ifeq ($(VARIANT),asan)
    FLAGS += -O1 -g -Wno-pass-failed -fno-omit-frame-pointer
    FLAGS += -fsanitize=address,undefined -fno-sanitize-recover=all
else ifeq ($(VARIANT),tsan)
    FLAGS += -O1 -g -Wno-pass-failed -fsanitize=thread
    override ONEDNN := no
else ifneq ($(VARIANT),)
    $(error VARIANT=$(VARIANT): must be empty, double, asan or tsan)
endif

# Under clang++ the program is linked with libomp, while a distribution's oneDNN asks for libgomp.
# No flag is needed for that: libomp exports libgomp's functions too, and as the program's own
# dependency it is searched before a library's, so one runtime serves both and no cores are shared.
ONEDNN ?= $(if $(filter wish:%/dnnl.h,$(MISSING)),no,yes)
ifeq ($(ONEDNN),yes)
    FLAGS += -DGPT2_ONEDNN
    LIBRARIES += -ldnnl
endif
FLAGS += $(CPPFLAGS) $(CXXFLAGS)

# Objects depend on this file, which changes when the flags, the compiler or the processor (because
# of -march=native) do. It is compared here and not in a rule so that `make -q` can answer 0.
PROCESSOR := $(shell grep -i -m1 -E '^(flags|features)' /proc/cpuinfo 2>/dev/null | cksum)
BUILT_WITH := $(shell $(CXX) --version 2>/dev/null | head -n 1) $(FLAGS) $(LDFLAGS) $(PROCESSOR)
ifeq ($(filter clean format help,$(MAKECMDGOALS)),)
    $(shell mkdir -p $(FOLDER); echo '$(BUILT_WITH)' | cmp -s - $(FOLDER)/flags || \
        echo '$(BUILT_WITH)' >$(FOLDER)/flags)
endif

# The state of the source, which a run notes in its log: in a file of its own, so that a commit
# compiles no more than that.
VERSION := $(if $(wildcard .git),$(shell git describe --always --dirty 2>/dev/null))
VERSION_SOURCE = const char* gpt2_version() { return "$(or $(VERSION),unknown)"; }
ifeq ($(filter clean format help,$(MAKECMDGOALS)),)
    $(shell echo '$(VERSION_SOURCE)' | cmp -s - $(FOLDER)/version.cpp || \
        echo '$(VERSION_SOURCE)' >$(FOLDER)/version.cpp)
endif

# ==== programs ===================================================================================

.PHONY: emu emu-programs cuda gpu-portable portable-programs cuda-headers nvcc programs faults fuzz-programs help own-text train test soak bench fuzz sanitize format clean FORCE

PLAIN_MATMUL := oneDNN not found: using the plain OpenMP matmul \
    (scripts/install_deps.sh installs it)
INCOMPLETE := cannot build without $(MISSING_HERE:run:%=%): scripts/install_deps.sh installs them, \
    and so do make train and make test

$(FOLDER)/%.o: %.cpp $(FOLDER)/flags
	$(if $(MISSING_HERE),@echo "$(INCOMPLETE)" >&2; exit 1)
	$(if $(filter wish:%/dnnl.h,$(MISSING)),$(if $(filter train_gpt2.cpp,$<),@echo "$(PLAIN_MATMUL)"))
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $(OWN_FLAGS) -MMD -MP -c $< -o $@

# The test sources are large and test code that train_gpt2.o holds, optimised: they come second on
# the link line, so that functions which both hold are taken from the first.
# (g++ 12 with the address sanitizer takes members of std::regex for uninitialised: GCC bug 105562.)
TEST_FLAGS := -O1 -Wno-pass-failed \
    $(if $(filter asan,$(VARIANT)),$(if $(findstring clang,$(CXX)),,-Wno-maybe-uninitialized))
$(FOLDER)/test_gpt2.o $(FOLDER)/dev/test/%.o: OWN_FLAGS := $(TEST_FLAGS)
# In double the program is made for dev/faults, which lets its allocations fail.
ifeq ($(VARIANT),double)
$(FOLDER)/train_gpt2.o: OWN_FLAGS := -O1 -Wno-pass-failed
endif

# train_gpt2.o holds a weak main(), which gives way to that of the tests or the benchmarks.
$(FOLDER)/version.o: $(FOLDER)/version.cpp
	$(CXX) -c $< -o $@

$(FOLDER)/train_gpt2: $(FOLDER)/train_gpt2.o $(FOLDER)/version.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) $(LIBRARIES)
	$(if $(MAKECMDGOALS),,@$(MAKE) --no-print-directory help)

# (In double the model alone is tested, and compiled.)
$(FOLDER)/test_gpt2: $(FOLDER)/$(if $(filter double,$(VARIANT)),twin_double,train_gpt2).o \
    $(FOLDER)/test_gpt2.o $(FOLDER)/version.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) -lgtest $(LIBRARIES)

# With the products of AMX, which is emulated in plain C++: dev/emu/amx.h.
$(FOLDER)/emulated_amx.o: train_gpt2.cpp $(FOLDER)/flags
	$(CXX) $(FLAGS) -DGPT2_EMULATED_AMX -MMD -MP -c $< -o $@
$(FOLDER)/test_gpt2_amx: $(FOLDER)/emulated_amx.o $(FOLDER)/test_gpt2.o $(FOLDER)/version.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) -lgtest $(LIBRARIES)

# What is made of a model: files, runs, and commands.
RUN_TESTS := $(addprefix dev/test/test_,runs checkpoint convert cli jobs plan)
RUN_TEST_OBJECTS := $(RUN_TESTS:%=$(FOLDER)/%.o)
ifeq ($(VARIANT),)  # they compute next to nothing themselves
$(RUN_TEST_OBJECTS): OWN_FLAGS := $(TEST_FLAGS) -O0
endif
$(FOLDER)/test_runs: $(FOLDER)/train_gpt2.o $(RUN_TEST_OBJECTS) $(FOLDER)/version.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) -lgtest $(LIBRARIES)

# What needs no twin: text to tokens to batches.
DATA_TESTS := $(addprefix dev/test/test_,data loader corpus tokenizer hellaswag ranks)
$(FOLDER)/test_data: $(DATA_TESTS:%=$(FOLDER)/%.o)
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) -lgtest $(TEXT_LIBRARIES)

$(FOLDER)/bench: $(FOLDER)/dev/bench/bench.o $(FOLDER)/dev/bench/plain_step.o $(FOLDER)/train_gpt2.o \
    $(FOLDER)/version.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) -lbenchmark $(LIBRARIES)

$(FOLDER)/save_bench: $(FOLDER)/dev/bench/save_bench.o $(FOLDER)/train_gpt2.o $(FOLDER)/version.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) $(LIBRARIES)

$(FOLDER)/tokenizer_bench: $(FOLDER)/dev/bench/tokenizer_bench.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) -lutf8proc -lxxhash

$(FOLDER)/loader_bench: $(FOLDER)/dev/bench/loader_bench.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) -lxxhash

-include $(wildcard $(FOLDER)/*.d $(FOLDER)/dev/bench/*.d $(FOLDER)/dev/test/*.d)

train_gpt2: $(FOLDER)/train_gpt2
	@ln -sf $< $@
ifneq ($(shell readlink train_gpt2),$(FOLDER)/train_gpt2)
.PHONY: train_gpt2
endif

programs: $(addprefix $(FOLDER)/,test_gpt2 \
    $(if $(filter double,$(VARIANT)),,train_gpt2 test_runs test_data))

# ==== the CUDA program on the emulator ===========================================================

# train_gpt2.cu is plain C++ where dev/emu stands in for the card: NVIDIA's headers, our libraries.
# It is compiled with -O2: the kernels are large, and -O3 gains nothing where fibers switch. nvcc
# makes one instruction of a product and a sum, and so does g++ unless told otherwise.
EMU_FLAGS = -isystem $(CUDA_HOME)/include -I. -Wno-unknown-pragmas -ffp-contract=fast \
    $(if $(filter yes,$(NCCL)),-DGPT2_NCCL)
NO_HEADERS := no NVIDIA headers here (cublasLt.h): install the CUDA toolkit, or set CUDA_HOME
EMU_OBJECTS := $(patsubst %.cpp,$(FOLDER)/%.o,$(filter-out dev/emu/test_% \
    $(if $(filter yes,$(NCCL)),,dev/emu/nccl%),$(wildcard dev/emu/*.cpp)))
CHECKS := $(patsubst dev/cuda/%.cu,%,$(wildcard dev/cuda/*.cu))

$(FOLDER)/dev/emu/%.o: OWN_FLAGS = $(EMU_FLAGS)
# The scheduler switches stacks, which no sanitizer may look into but the thread sanitizer is told
# of. Products are slow under them, and find out of bounds for themselves.
$(FOLDER)/dev/emu/scheduler.o: OWN_FLAGS = $(EMU_FLAGS) -fno-sanitize=all \
    $(if $(filter tsan,$(VARIANT)),-DEMU_TSAN)
$(FOLDER)/dev/emu/cublaslt.o: OWN_FLAGS = $(EMU_FLAGS) -O2 -fno-sanitize=all
# What ranks add up is the same whichever compiler built them.
$(FOLDER)/dev/emu/nccl_reduce.o: OWN_FLAGS = $(EMU_FLAGS) -ffp-contract=off
EMU_OPT = $(if $(filter asan tsan,$(VARIANT)),-O1,-O2)

# A program of a layer's takes all layers, and does not call all.
$(FOLDER)/dev/cuda/%.o: OWN_FLAGS = -Wno-unused-function

# (The flags above are not among those that the file `flags` holds.)
$(EMU_OBJECTS) $(FOLDER)/twin_float.o $(FOLDER)/twin_double.o: Makefile

$(FOLDER)/%.cu.o: %.cu $(FOLDER)/flags Makefile
	$(if $(CUDA_HEADERS),,@echo "$(NO_HEADERS)" >&2; exit 1)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $(EMU_OPT) $(EMU_FLAGS) $(OWN_FLAGS) -MMD -MP -x c++ -c $< -o $@

$(FOLDER)/train_gpt2cu_emu: $(FOLDER)/train_gpt2.cu.o $(EMU_OBJECTS) $(FOLDER)/version.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) $(LIBRARIES)

# The CPU twin's layers are what kernels are held against, in double, and in float to say how far
# off float32 may be: there it adds up in order, without vectors and without a library, so that the
# yardstick is the same on every machine (under g++; clang++ keeps lanes in reductions). Its functions are made weak, so that those of the contract
# give way to the CUDA program's.
IN_ORDER = -O2 -ffp-contract=fast -fno-tree-vectorize -DGPT2_IN_ORDER -Wno-unused-function
WEAKEN = nm -g --defined-only $< | awk '{print $$NF}' >$@.names && \
    objcopy --weaken-symbols=$@.names $< $@
$(FOLDER)/twin_double.o: train_gpt2.cpp $(FOLDER)/flags
	$(CXX) $(filter-out -DGPT2_ONEDNN,$(FLAGS)) -DGPT2_MODEL_ONLY -DGPT2_REAL=double \
	    -MMD -MP -c $< -o $@
$(FOLDER)/twin_float.o: train_gpt2.cpp $(FOLDER)/flags
	$(CXX) $(filter-out -DGPT2_ONEDNN,$(FLAGS)) -DGPT2_MODEL_ONLY $(IN_ORDER) -MMD -MP -c $< -o $@
$(FOLDER)/weak_%.o: $(FOLDER)/%.o
	$(WEAKEN)

$(FOLDER)/test_gpt2cu_emu: $(FOLDER)/test_gpt2.o $(FOLDER)/train_gpt2.cu.o $(EMU_OBJECTS) \
    $(FOLDER)/weak_train_gpt2.o $(FOLDER)/version.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) -lgtest $(LIBRARIES)

$(FOLDER)/test_runscu_emu: $(FOLDER)/train_gpt2.cu.o $(RUN_TEST_OBJECTS) $(EMU_OBJECTS) \
    $(FOLDER)/version.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) -lgtest $(LIBRARIES)

$(FOLDER)/test_emu: $(addprefix $(FOLDER)/dev/emu/,test_emu.o $(if $(filter yes,$(NCCL)),test_nccl.o)) \
    $(EMU_OBJECTS)
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) -lgtest $(LIBRARIES)

$(FOLDER)/check_%: $(FOLDER)/dev/cuda/%.cu.o $(EMU_OBJECTS) $(FOLDER)/weak_twin_float.o \
    $(FOLDER)/weak_twin_double.o $(FOLDER)/version.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) $(LIBRARIES)

-include $(wildcard $(FOLDER)/dev/emu/*.d $(FOLDER)/dev/cuda/*.d)

# For scripts: where the headers and the compiler are, or an empty line.
cuda-headers:
	@echo $(CUDA_HEADERS)
nvcc:
	@echo $(NVCC)

emu: $(FOLDER)/train_gpt2cu_emu
	@ln -sf $< train_gpt2cu_emu

emu-programs: $(addprefix $(FOLDER)/,train_gpt2cu_emu test_gpt2cu_emu test_runscu_emu \
    test_emu) \
    $(addprefix $(FOLDER)/check_,$(CHECKS))

# ==== faults =====================================================================================

# What dev/faults has: a library that stands between a program and the C library, and a harness that
# starts programs with it. The library is not compiled like the rest: it runs inside the program,
# beside any sanitizer or OpenMP runtime, and depends on nothing but the C library.
FAULTS_FLAGS := -std=c++20 -O2 -fPIC -shared -Wall -Wextra -Werror -fno-builtin -fno-exceptions \
    -fno-rtti -fno-threadsafe-statics -fvisibility=hidden -U_FORTIFY_SOURCE
$(FOLDER)/dev/faults/run_faults.o: OWN_FLAGS = -O1

$(FOLDER)/faults.so: dev/faults/faults.cpp $(wildcard dev/faults/*.h) $(FOLDER)/flags Makefile
	$(CXX) $(FAULTS_FLAGS) $(CPPFLAGS) $< -nodefaultlibs -lc -lgcc -o $@

$(FOLDER)/run_faults: $(FOLDER)/dev/faults/run_faults.o
	$(CXX) $(FLAGS) $^ -o $@ $(LDFLAGS) $(LIBRARIES)

faults: $(addprefix $(FOLDER)/,faults.so run_faults train_gpt2)

-include $(wildcard $(FOLDER)/dev/faults/*.d)

# ==== fuzzing ====================================================================================

# Each dev/fuzz/fuzz_TARGET.cpp is a program of libFuzzer's, which comes with clang++; none needs a
# twin. A new target is a new file, and seeds for it in make_seeds.cpp.
FUZZ := build/fuzz
FUZZ_FLAGS = -std=c++20 -O1 -g -fno-omit-frame-pointer -fopenmp -Wall -Wextra -Werror \
    -Wno-pass-failed -Wno-unused-function $(PACKING) $(CPPFLAGS)
FUZZ_SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZ_PROGRAMS := $(patsubst dev/fuzz/%.cpp,$(FUZZ)/%,$(wildcard dev/fuzz/fuzz_*.cpp))

$(FUZZ)/fuzz_%: dev/fuzz/fuzz_%.cpp Makefile
	@mkdir -p $(@D)
	clang++ $(FUZZ_FLAGS) $(FUZZ_SANITIZERS) -fsanitize=fuzzer -MMD -MP $< -o $@ $(LDFLAGS) \
	    $(TEXT_LIBRARIES)
$(FUZZ)/make_seeds: dev/fuzz/make_seeds.cpp Makefile
	@mkdir -p $(@D)
	clang++ $(FUZZ_FLAGS) -MMD -MP $< -o $@ $(LDFLAGS) $(TEXT_LIBRARIES)

fuzz-programs: $(FUZZ_PROGRAMS) $(FUZZ)/make_seeds

-include $(wildcard $(FUZZ)/*.d)

# ==== the CUDA program ===========================================================================

# For the cards of these architectures, or for the one that is here (CUDA_ARCH=native).
CUDA_ARCH ?= 80 90a
CUDA_CODE = $(if $(filter native,$(CUDA_ARCH)),$(CUDA_NATIVE),$(foreach a,$(CUDA_ARCH),\
    -gencode arch=compute_$(a),code=sm_$(a)) $(if $(filter 80,$(CUDA_ARCH)),\
    -gencode arch=compute_80$(comma)code=compute_80))
# (For a Hopper card nvcc means 9.0 by that, which lacks what 9.0a has.)
CUDA_NATIVE = $(if $(filter 9.0,$(shell \
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)),\
    -gencode arch=compute_90a$(comma)code=sm_90a,-arch=native)
comma := ,
empty :=
space := $(empty) $(empty)
NVCC_FLAGS = -std=c++20 -O3 --expt-relaxed-constexpr --threads 0 $(CUDA_CODE) -I. \
    -Werror all-warnings -Xptxas -v \
    -Xcompiler $(subst $(space),$(comma),$(strip $(ARCH) -fopenmp -Wall -Wextra)) $(CPPFLAGS) \
    $(if $(filter yes,$(NCCL)),-DGPT2_NCCL) \
    $(if $(findstring portable,$(CUDA_FOLDER)),,$(PACKING))
CUDA_FOLDER ?= build/cuda

# A program of a layer's takes all layers, and does not call all.
$(CUDA_FOLDER)/dev/cuda/%.o: OWN_FLAGS = -diag-suppress 177
$(CUDA_FOLDER)/dev/cuda/attention.o: OWN_FLAGS = -diag-suppress 177 \
    $(if $(filter yes,$(CUDNN)),-DGPT2_CUDNN)

# The compiler's report on registers and spills is kept beside the object, for the tests.
$(CUDA_FOLDER)/%.o: %.cu $(wildcard *.h) train_gpt2.cu $(wildcard dev/cuda/*.cuh) Makefile
	$(if $(NVCC),,@echo "no nvcc here: install the CUDA toolkit, or set CUDA_HOME" >&2; exit 1)
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) $(OWN_FLAGS) -c $< -o $@ 2>$(basename $@).ptxas || (cat $(basename $@).ptxas; exit 1)

CUDA_LINK = $(NVCC) $(CUDA_CODE) $^ -o $@ -Xcompiler -fopenmp $(LDFLAGS) -lcublasLt \
    $(if $(filter yes,$(NCCL)),-lnccl)

$(CUDA_FOLDER)/train_gpt2cu: $(CUDA_FOLDER)/train_gpt2.o $(FOLDER)/version.o
	$(CUDA_LINK) $(LIBRARIES)

cuda: $(CUDA_FOLDER)/train_gpt2cu
	@ln -sf $< train_gpt2cu

# For a machine with a GPU and little else: the program, its tests and the layers' benchmarks, with
# all but cuBLASLt, NCCL and the driver linked in. dev/bench/gpu.sh takes them from there.
PORTABLE := build/gpu-portable
# Functions that a program does not call are left out of it: the programs of the layers hold all of
# the CPU twin twice, and what travels is to be small. (One of them is libstdc++'s random device,
# which would ask for a newer C library than the machine there may have.)
SECTIONS := -ffunction-sections -fdata-sections
PORTABLE_LINK = $(NVCC) $(CUDA_CODE) $^ -o $@ -cudart static \
    -Xcompiler -static-libstdc++,-static-libgcc -Xlinker --gc-sections,--strip-all \
    -lcublasLt $(if $(filter yes,$(NCCL)),-lnccl) -l:libutf8proc.a -l:libxxhash.a -l:libgomp.a \
    -lpthread -ldl
PORTABLE_CXX = $(CXX) $(filter-out -march=% -DGPT2_ONEDNN $(PACKING),$(FLAGS)) \
    -march=x86-64-v3 $(SECTIONS)

gpu-portable:
	@$(MAKE) --no-print-directory ARCH="-march=x86-64-v3 $(SECTIONS)" \
	    CUDA_FOLDER=build/cuda-portable portable-programs

portable-programs: $(addprefix $(PORTABLE)/,train_gpt2cu test_gpt2cu test_runscu train_gpt2 \
    $(CHECKS))

$(PORTABLE)/train_gpt2cu: $(CUDA_FOLDER)/train_gpt2.o $(FOLDER)/version.o
	@mkdir -p $(@D)
	$(PORTABLE_LINK)
$(PORTABLE)/test_gpt2cu: $(CUDA_FOLDER)/test_gpt2.cpp.o $(CUDA_FOLDER)/train_gpt2.o \
    $(CUDA_FOLDER)/weak_twin.o $(FOLDER)/version.o
	@mkdir -p $(@D)
	$(PORTABLE_LINK) -l:libgtest.a
$(PORTABLE)/test_runscu: $(CUDA_FOLDER)/train_gpt2.o $(RUN_TESTS:%=$(CUDA_FOLDER)/%.cpp.o) \
    $(FOLDER)/version.o
	@mkdir -p $(@D)
	$(PORTABLE_LINK) -l:libgtest.a
$(PORTABLE)/train_gpt2: $(CUDA_FOLDER)/twin.o $(FOLDER)/version.o
	@mkdir -p $(@D)
	$(PORTABLE_CXX) $^ -o $@ -static-libstdc++ -static-libgcc -Wl,--gc-sections,--strip-all \
	    -l:libutf8proc.a -l:libxxhash.a -l:libgomp.a -lpthread
$(addprefix $(PORTABLE)/,$(CHECKS)): $(PORTABLE)/%: $(CUDA_FOLDER)/dev/cuda/%.o \
    $(CUDA_FOLDER)/weak_twin_float.o $(CUDA_FOLDER)/weak_twin_double.o $(FOLDER)/version.o
	@mkdir -p $(@D)
	$(PORTABLE_LINK)
$(CUDA_FOLDER)/%.cpp.o: %.cpp $(wildcard *.h dev/test/*.h) Makefile
	@mkdir -p $(@D)
	$(PORTABLE_CXX) -O1 -c $< -o $@
$(CUDA_FOLDER)/twin.o: train_gpt2.cpp $(wildcard *.h) Makefile
	@mkdir -p $(@D)
	$(PORTABLE_CXX) -c $< -o $@
$(CUDA_FOLDER)/twin_float.o: train_gpt2.cpp $(wildcard *.h) Makefile
	@mkdir -p $(@D)
	$(PORTABLE_CXX) -DGPT2_MODEL_ONLY $(IN_ORDER) -c $< -o $@
$(CUDA_FOLDER)/twin_double.o: train_gpt2.cpp $(wildcard *.h) Makefile
	@mkdir -p $(@D)
	$(PORTABLE_CXX) -DGPT2_MODEL_ONLY -DGPT2_REAL=double -c $< -o $@
$(CUDA_FOLDER)/weak_%.o: $(CUDA_FOLDER)/%.o
	$(WEAKEN)

# ==== what a person asks for =====================================================================

help:
	@echo "make            builds ./train_gpt2; ./train_gpt2 --help says what that can do"
	@echo "make cuda       builds ./train_gpt2cu, the same for NVIDIA GPUs: [CUDA_ARCH=native]"
	@echo "make emu        builds ./train_gpt2cu_emu: that program on a CPU, slowly, to test it"
	@echo "make train      trains a model and samples from it: [DATA=path] [OUT=folder] [TIME=120]"
	@echo "make test       runs every test, with every compiler that is here"
	@echo "make soak       a fault at every call of a run, and a thousand kills; takes hours"
	@echo "make fuzz       random damage to what is read from strangers, 20 s a kind: [FUZZ_TIME=300]"
	@echo "make bench      times the layers, a step of GPT-2 124M beside plain loops, its saving, shards, the tokenizer"
	@echo "make sanitize   runs the tests under the address, undefined and thread sanitizers"
	@echo "make format     applies .clang-format"
	@echo "make clean      removes what was built"

# The project's own text: every text file of the tree that no program made, without fixtures and
# virtual environments, found without git, which a release archive has none of. grep -I passes over
# binary and empty files. (A command and not its output: what lies beside the sources may have any
# name, and be more than a command line holds.)
HIDDEN_TEXT := .ci/run .clang-format .gitignore
VISIBLE_TEXT = find * \( -path build -o -path runs -o -path shared -o -path dev/data -o -name fixtures \
    -o -name __pycache__ -o -name '.?*' -o -type d -exec test -e {}/pyvenv.cfg \; \) -prune \
    -o -type f ! -name '*.tmp' ! -name '*.safetensors' ! -name '*.npy' -exec grep -Iq . {} \; \
    -print | LC_ALL=C sort

own-text:
	@printf '%s\n' $(HIDDEN_TEXT)
	@$(VISIBLE_TEXT)

# A copy of it, so that the commands that the program prints are short and name one folder.
build/source: FORCE
	@rm -rf $@ && mkdir -p $@ && $(VISIBLE_TEXT) | tar cf - -T - | tar xf - -C $@
FORCE:

# Unless OUT does, the program chooses the run folder (runs/source, runs/source-2, ...); the newest
# is the one that it has just written. DATA is one path, of any name, where there is such a file,
# and several words where there is none.
TIME ?= 120
PROMPT ?= $(if $(DATA),,// ====)
quoted = '$(subst ','\'',$(1))'
IS_ONE = $(shell test -e $(call quoted,$(DATA)) && echo yes)
TEXT = $(if $(DATA),$(if $(IS_ONE),$(call quoted,$(DATA)),$(DATA)),build/source $(HIDDEN_TEXT))
RUN = $(or $(OUT),$$(ls -td runs/*/last | head -n 1 | sed 's,/last$$,,'))

train: $(if $(DATA),,build/source)
	@scripts/install_deps.sh run
	@$(MAKE) --no-print-directory train_gpt2
	./train_gpt2 train --data $(TEXT) $(if $(OUT),--out $(call quoted,$(OUT))) --time-limit $(TIME)
	@echo
	@echo "---- a longer sample ----"
	@./train_gpt2 sample --model "$(RUN)" --prompt "$(PROMPT)" --max-new-tokens 600 --temperature 0.8
	@echo
	@echo "---- what to try next ----"
	@echo "other text        make train DATA=path (a file, or a folder of them)"
	@echo "more time         make train TIME=600"
	@echo "a larger model    ./train_gpt2 train --data $(TEXT) --model small --time-limit 600"
	@echo "another sample    ./train_gpt2 sample --model $(RUN) --prompt \"...\" --temperature 0.7"
	@echo "how good it is    ./train_gpt2 evaluate --model $(RUN) --data FILE"
	@echo "every option      ./train_gpt2 train --help"

# All go through dev/test.sh, which builds what it runs and adds up what the parts counted.
test:
	@scripts/install_deps.sh test
	@MAKE="$(MAKE_COMMAND)" dev/test.sh test

soak:
	@scripts/install_deps.sh test
	@MAKE="$(MAKE_COMMAND)" dev/test.sh soak

sanitize:
	@scripts/install_deps.sh test
	@MAKE="$(MAKE_COMMAND)" dev/test.sh sanitize

# Seconds for each target.
FUZZ_TIME ?= 20
fuzz:
	@scripts/install_deps.sh clang
	@MAKE="$(MAKE_COMMAND)" FUZZ_TIME=$(FUZZ_TIME) dev/fuzz/run.sh

# The tokenizer is timed beside the libraries that the Python has.
PYTHON ?= $(firstword $(wildcard $(HOME)/.peers/bin/python) $(shell command -v python3))
MERGES ?= $(firstword $(wildcard ../shared/data/gpt2_vocab.bpe dev/data/gpt2/vocab.bpe gpt2/vocab.bpe))
TEXTS ?= ../shared/data/tinyshakespeare.txt
BENCH ?= --benchmark_min_time=0.2
bench:
	@scripts/install_deps.sh bench
	@$(MAKE) --no-print-directory $(addprefix $(FOLDER)/,bench save_bench loader_bench tokenizer_bench)
	$(FOLDER)/bench $(BENCH)
	$(FOLDER)/save_bench
	$(FOLDER)/loader_bench
	$(if $(and $(PYTHON),$(MERGES)),$(PYTHON) dev/bench/tokenizer_bench.py $(MERGES) \
	    $(wildcard $(TEXTS)) --program $(FOLDER)/tokenizer_bench,@echo "-- skipped: the tokenizer's \
	    speed: no python3, or no vocab.bpe of GPT-2 (scripts/data_gpt2.sh fetches it)")

SOURCES = $(wildcard *.h *.cpp *.cu dev/*/*.h dev/*/*.cpp dev/*/*.cuh dev/*/*.cu)
format:
	clang-format -i $(SOURCES)

clean:
	rm -rf build train_gpt2 train_gpt2cu train_gpt2cu_emu
