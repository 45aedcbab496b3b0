// What every test source uses: a folder to write in, the error of a call, and the line of counts.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <random>
#include <string>
#include <system_error>
#include <vector>

#include "../../files.h"

inline std::vector<int> random_ids(size_t count, int below, unsigned seed) {
    std::mt19937 generator(seed);
    std::uniform_int_distribution<int> draw(0, below - 1);
    std::vector<int> ids(count);
    for (int& id : ids) id = draw(generator);
    return ids;
}

// A new empty folder for the running test; all of them go when the program ends.
inline std::string test_folder() {
    static struct Root {
        std::string path;
        int count = 0;
        Root() {
            std::string pattern = (fs::temp_directory_path() / "test_gpt2_XXXXXX").string();
            path = mkdtemp(pattern.data()) != nullptr ? pattern : "";
        }
        ~Root() {
            std::error_code ignored;
            fs::remove_all(path, ignored);
        }
    } root;
    std::string folder = root.path + "/" + std::to_string(root.count++);
    fs::create_directories(folder);
    return folder;
}

// "CODE message" of the Error that f throws, "" when it throws none.
template <typename F>
std::string error_of(F f) {
    try {
        f();
    } catch (const Error& error) { return std::to_string(error.exit_code) + " " + error.what(); }
    return "";
}

// Every test of a file that must be refused: exit code 2, and a line that has `expected` in it.
inline void expect_refused(const std::string& error, const std::string& expected) {
    EXPECT_EQ(error.substr(0, 2), "2 ") << error;
    EXPECT_NE(error.find(expected), std::string::npos) << error << "\nlacks: " << expected;
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
}

// Runs the tests that --gtest_filter names, else those of `filter`. The last line is `N passed,
// N failed, N skipped`.
inline int run_tests(int argc, char** argv, const std::string& filter = "*") {
    testing::InitGoogleTest(&argc, argv);
    if (testing::GTEST_FLAG(filter) == "*") testing::GTEST_FLAG(filter) = filter;
    int status = RUN_ALL_TESTS();
    const testing::UnitTest& tests = *testing::UnitTest::GetInstance();
    printf("%d passed, %d failed, %d skipped\n", tests.successful_test_count(),
           tests.failed_test_count(), tests.skipped_test_count());
    return status;
}
